"""``python -m deeptwist``."""

from deeptwist.app.cli import main

main()
