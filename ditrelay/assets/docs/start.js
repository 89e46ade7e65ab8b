// The API page: Swagger UI over this server's own description. No badge: it would be asked for at another site.
SwaggerUIBundle({ url: "openapi.json", dom_id: "#api", deepLinking: true, validatorUrl: null });
