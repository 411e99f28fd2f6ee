"""`python -m skive.cli`."""

from skive.cli import main

main()
