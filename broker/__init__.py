"""The queue inside Redis: connections, the embedded server, and one Lua script an operation.

``producer`` and ``worker`` both stand on this package; it imports ``schemas`` and neither of them.
"""
