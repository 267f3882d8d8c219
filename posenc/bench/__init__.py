"""What remapped attention costs: cases, timing, memory, result files and the page made from them.

``cases`` says what is measured, ``attention`` and ``model`` build the two sides of a case, ``timing`` and
``memory`` measure them, ``results`` is the file format, and ``goals`` and ``report`` make the page.
"""
