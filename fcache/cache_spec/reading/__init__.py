"""Reading records: out of maps, by position, or as ranges of objects."""
