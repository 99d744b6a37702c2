"""The `retrolm` command: parsing and presentation; the work is done in `retrolm.engine`."""
