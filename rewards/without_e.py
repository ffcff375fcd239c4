"""A reward for texts without the letter e: minus how many they have."""


def reward(prompt, completion, answer):
    return -completion.lower().count("e")
