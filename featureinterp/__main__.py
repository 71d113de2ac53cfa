"""``python -m featureinterp``: the command line."""

from featureinterp.cli.main import main

main()
