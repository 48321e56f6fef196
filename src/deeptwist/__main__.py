"""``python -m deeptwist``."""

from deeptwist.cli import main

main()
