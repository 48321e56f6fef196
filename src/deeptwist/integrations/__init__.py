"""DeepTwist in other people's training loops; each adapter needs its own library.

Nothing is imported here: ``deeptwist.integrations.lightning`` and ``.transformers`` hold a callback
each. A plain loop and Accelerate's need none, see ``docs/integrations.md``.
"""
