"""The launch doctor: processes, devices, network, shared folder, clocks, data and room, before any GPU hour is spent.

examination   the phases, in order, on every rank; a report on rank 0
team          how ranks talk (the launcher's own store), and how one that does not answer is noticed
process       what a process says of itself; rows about processes, devices, versions
network       all_reduce: is it right, how fast
folder        the run folder seen from all nodes: visibility, renames, locks
clock         clocks of the nodes and of the file system
data          weights and chunk from all nodes, decode rate, compute rate
room          disk forecast, memory plan, and what the step needs of network and loader
"""
