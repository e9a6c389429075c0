"""Coming from kohya's sd-scripts: what a command means here, and states that were begun there."""
