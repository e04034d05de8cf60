"""The verbs, one a module: each does one thing to a workspace and imports no other verb.

They are a package of their own because `vpstore.resolve` and `vpstore.build` are functions of the Python API: a module
of the same name would take their place as soon as it was imported.
"""
