"""The parts that a restore shares with a dump and a move: one attempt at changing a VM.

`authentication` makes sure of the agent, `copier` moves pages between frames and files,
`settings` writes values of kernel objects, `journal` lists the writes, `undo` reverts those that
outlive the tree, `stopwatch` measures the steps.
"""
