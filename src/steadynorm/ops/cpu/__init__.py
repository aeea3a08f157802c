"""The CPU backend: Numba kernels.

memory.py      arrays over addresses, half precision, tasks; compiling.py: Numba's decorators
call.py        the struct that a kernel is called with; kernel.py: compiles kernels and runs them on torch's threads
geometry.py    how a tensor's memory is read, and how it is cut into tasks
channel.py     per channel: statistics settled, constants, coefficients
planes.py      arithmetic where a channel's values are neighbours; plane_kernels.py: the kernels, task by task
columns.py     arithmetic where they lie apart; column_kernels.py
bending.py     the activation within a loop; smooth.py, elementary.py: those that are not straight lines; bits.py: what
               is kept of one after a residual
backend.py     the reference's functions by these kernels; pages.py: memory for what they return
shortcut.py    a layer's shortest way to the kernels; committing.py: its running statistics
turns.py       lets one of several processes compile a kernel for all
"""
