"""The formulas in plain torch: the truth in float64, and a slow path on any device.

Each file has the differentiable formula under the operation's own name, and the functions that
every backend offers (`forward`, `backward`, …), in chunks where the formula would store N × M.
"""
