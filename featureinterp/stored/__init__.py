"""What is on disk proves itself: checksums by block, sealed markers, arrays that are checked where they are
read.
"""
