"""`alignkit plan`: what a run will take, calculated before anything is downloaded or loaded."""
