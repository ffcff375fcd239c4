"""A reward for right sums: "042+917=" is answered by the digits of 959 from the last one on, "9590"."""


def reward(prompt, completion, answer):
    a, b = prompt.rstrip("=").split("+")
    return float(completion == f"{int(a) + int(b):04}"[::-1])
