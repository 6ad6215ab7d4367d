"""Models that this project did not write, each adapted, trained for ten steps and merged."""
