"""
What the commands share. A folder imports only from those before it: text, formats, generation, training,
measuring. Nothing in here imports a command.
"""
