"""`python -m teal_cli` is the same program as `teal`."""

from teal_cli.app import main

if __name__ == "__main__":
    main()
