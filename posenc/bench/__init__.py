"""The cost of remapped attention: cases, timing, memory, result files and the page made from them.

``cases``, ``shapes`` and ``settings`` define what is measured; ``attention``, ``model`` and ``padded`` build the two
sides of a case; ``timing``, ``cuda`` and ``memory`` measure them; ``results`` is the file format; ``goals`` and
``report`` make the page.
"""
