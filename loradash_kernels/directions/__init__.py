"""Change rates of the singular directions of frozen weights, and the decompositions they are measured at.

`rates` and `kept` are what others call: directions of a weight now, or of a decomposition that was kept. Both go through
`decompose`, the loop over the routes that `policy` names, and through `choice`; `checks` says what may be trusted.
`decompositions` holds what a route finds, `randomized_svd` and `linalg` compute it, and `kernels` is the door to a GPU's.
"""
