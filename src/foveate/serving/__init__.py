"""A model behind OpenAI's wire format; `foveate serve` starts it, `app.create_app` builds it.

Needs ``pip install 'foveate[serve]'``.
"""
