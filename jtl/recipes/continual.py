"""Several tasks one after the other on one backbone, and what each costs those before it.

Every task has its own head; penalties keep to the tasks that came before. The same tasks are also run
without penalties, so that the table shows what the penalty is worth.
"""
