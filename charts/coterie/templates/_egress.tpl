{{/* Where every serving pod may connect to: names, the object store, and what the values add. */}}
{{- define "coterie.egress" -}}
- ports: [{port: 53, protocol: UDP}, {port: 53, protocol: TCP}]
- ports: [{port: {{ regexFind ":[0-9]+" .Values.s3.endpoint | trimPrefix ":" | default (ternary "80" "443" (hasPrefix "http:" .Values.s3.endpoint)) }}}]
{{- with .Values.networkPolicies.extraEgress }}
{{ toYaml . }}
{{- end }}
{{- end }}
