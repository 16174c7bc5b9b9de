"""`opd-ds bench`: claims of the paper, checked by runs of our own."""
