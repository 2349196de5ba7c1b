"""``python -m salmon_revsmtp``: the command without its script."""

from salmon_revsmtp.cli.main import main

main()
