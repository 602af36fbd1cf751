"""Where patch tokens find their place again: views of one scene, whose geometry says which places belong together.

A point is (x, y) in pixels, x to the right and y down; the first pixel covers 0 to 1 and has its centre at 0.5, in
images of any size, so that scaling an image scales its points and nothing else.
"""
