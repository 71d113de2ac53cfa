"""Models of this process: a chat, simulators, and the cache of a shared prefix that they read behind."""
