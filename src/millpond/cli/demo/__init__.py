"""`millpond demo`: one real AI job on the whole road, a killed worker included."""
