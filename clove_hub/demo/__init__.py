"""`clove-hub demo`: the whole road in a few minutes, by the commands that a user would type, and a page to look at.

What it shows is done elsewhere: nothing here trains or draws but by starting commands.
"""
