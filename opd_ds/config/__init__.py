"""The typed run config, how it is read, and how names in it become files."""
