"""One file here is one image layout: where an image's visual tokens lie on it.

A file names the model types (or vision tower types) that it `serves` and has one function `grid`,
a `Layout`; `foveate.families.layout.grids` finds them by walking this folder and the entry-point
group ``foveate.families``. Only crops and heat maps need layouts; attention needs none. Where no
file names a model, `foveate.families.probe` finds its layout by looking.
"""
