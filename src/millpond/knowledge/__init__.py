"""Knowledge: documents become chunks with vectors and lexemes; questions become cited passages."""
