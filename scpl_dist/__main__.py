"""``python -m scpl_dist`` is the command ``scpl-dist``."""

from scpl_dist.cli import main

main()
