{{/* What pod security `restricted` asks of a pod; the argument is its user. */}}
{{- define "coterie.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ . }}
runAsGroup: {{ . }}
fsGroup: {{ . }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* And of a container. */}}
{{- define "coterie.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "coterie.pullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{/* Nodes of a pod, by the part of the values that names them. */}}
{{- define "coterie.nodes" -}}
{{- with .nodeSelector }}
nodeSelector: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{ toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* An environment variable from a Secret: (list SECRET VARIABLE OPTIONAL). */}}
{{- define "coterie.secretVariable" -}}
- name: {{ index . 1 }}
  valueFrom: {secretKeyRef: {name: {{ index . 0 }}, key: {{ index . 1 }}, optional: {{ index . 2 }}}}
{{- end }}

{{/* A value as it was written: Helm reads 2000000 as 2e+06, which is no whole number to us. */}}
{{- define "coterie.number" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) }}{{ int64 . }}{{ else }}{{ toString . }}{{ end -}}
{{- end }}

{{/* Settings of router or predictor as environment variables. */}}
{{- define "coterie.settings" -}}
{{- range $name, $value := . }}
- name: COTERIE_{{ upper $name }}
  value: {{ include "coterie.number" $value | quote }}
{{- end }}
{{- end }}

{{- define "coterie.s3Variables" -}}
{{- $secret := include "coterie.s3Secret" . -}}
{{- range list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" "AWS_ENDPOINT_URL" "AWS_REGION" "AWS_DEFAULT_REGION" }}
{{ include "coterie.secretVariable" (list $secret . true) }}
{{- end }}
{{- end }}

{{- define "coterie.tokenVariable" -}}
{{- if .Values.token.enabled }}
{{ include "coterie.secretVariable" (list (include "coterie.tokenSecret" .) "COTERIE_TOKEN" false) }}
{{- end }}
{{- end }}

{{/* What a Job's pod has in common: (list $ COMPONENT SERVICE_ACCOUNT TOKEN). */}}
{{- define "coterie.jobPod" -}}
{{- $root := index . 0 -}}
serviceAccountName: {{ index . 2 }}
automountServiceAccountToken: {{ index . 3 }}
enableServiceLinks: false
restartPolicy: Never
securityContext: {{ include "coterie.podSecurity" 10001 | nindent 2 }}
{{- include "coterie.pullSecrets" $root }}
{{- include "coterie.nodes" $root.Values.jobs }}
{{- end }}
