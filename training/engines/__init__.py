"""How a step's gradients come together over processes. One implementation per kind of parallelism."""
