"""`clove-hub demo`: the whole pipeline in minutes, with the commands that a user would type, and a page of results.

Nothing here trains or draws by itself; it only starts commands.
"""
