"""`python -m lory.cli`."""

from lory.cli import main

main()
