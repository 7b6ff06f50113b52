"""A policy behind the OpenAI API: requests that come within a few milliseconds are decoded together.

engine.py    the thread that decodes: places, a queue in front of them
protocol.py  what a body may ask, and what an answer looks like
text.py      tokens to text as they come: stop strings, letters of several tokens
server.py    HTTP: limits, token, streaming, health, metrics, a clean end
"""
