"""The operations under the layers: measure, normalize and commit on tensors, one file per backend.

`reference` is plain torch: readable, any dtype, any device, differentiable to any order. It is the oracle that every
other backend is held against, and what runs where no other one can.
"""
