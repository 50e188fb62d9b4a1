"""Where the mixers attend: overlap of attention with the tokens to retrieve (Table 3, Figures 5, 8, 9, 10).

Models whose first layer is fixed (the token before) learn to recall. What the second layer then attends to,
at every query, is compared with the position of the value asked for, over many examples.
"""
