"""What a measurement found, as every command shows and writes it: tables, JSON, CSV, Markdown."""
