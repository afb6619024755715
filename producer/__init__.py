"""What a person or a program uses: prompts files in, one result per job out.

The command line is ``producer.cli``, the Python client ``producer.client.Client``. This package
never imports torch, and its modules import Redis, pydantic and Rich only where they are used, so
that ``producer --help`` answers at once.
"""
