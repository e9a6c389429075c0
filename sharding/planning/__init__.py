"""The parts of `plan`: pure functions from kept keys to chunks."""
