"""What crosses the wire: jobs, results, adapters, worker states, key names and errors.

Every model here is validated when it is read and encodes itself when it is written. This package
imports no other code of the project.
"""

#: Version of the records described here; it stands in every job hash as ``v``. Workers read this
#: one and the one before; records of any other version they leave alone.
WIRE_VERSION = 2
