"""`python -m opd_ds.cli`, as launchers start it."""

from opd_ds.cli.main import main

if __name__ == "__main__":
    main()
