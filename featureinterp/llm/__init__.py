"""Calls to language models: one adapter for every OpenAI-compatible endpoint, wrappers around it, and a local
server.
"""
