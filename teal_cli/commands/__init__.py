"""One thin module a command: it parses, calls the core and renders what comes back.

Each module defines one function named after its command (`evaluate` for `eval`), registered in
`teal_cli.app`. Its first line of docstring is the command's help. Core packages are imported
inside the function, so that `teal --help` loads neither torch nor transformers.

What several commands do with what they found is in `results`; how a profile looks at a terminal, in
`profile_view`; `calibrate --show`, which calibrates nothing, in `calibrate_show`.
"""
