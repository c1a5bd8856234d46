"""Videos on disk: reading and writing them, their captions and masks, and which of them can be used."""
