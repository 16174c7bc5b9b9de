"""The `opd-ds` command, one thin file per sub-command. Importing it loads neither torch nor diffusers."""
