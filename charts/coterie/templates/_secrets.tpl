{{/*
Keys and passwords, the same for all templates of one rendering, in .Values.generated: given, else those of the Secret that
is there already, else new ones. What was made is never replaced by another: pseudonyms, and the database, would not know it.
*/}}
{{- define "coterie.generate" -}}
{{- if not (hasKey .Values "generated") }}
  {{- $key := include "coterie.kept" (list . (printf "%s-pseudonym" .Release.Name) "COTERIE_PSEUDONYM_KEY" .Values.pseudonym.key "pseudonym.key" "every worker would be a stranger, and every profile lost") }}
  {{- $redis := include "coterie.kept" (list . (printf "%s-stores" .Release.Name) "REDIS_PASSWORD" "" "" "") }}
  {{- $postgresql := include "coterie.kept" (list . (printf "%s-stores" .Release.Name) "POSTGRESQL_PASSWORD" "" "" "") }}
  {{- $token := include "coterie.kept" (list . (printf "%s-token" .Release.Name) "COTERIE_TOKEN" "" "" "") }}
  {{- $_ := set .Values "generated" (dict "key" $key "redis" $redis "postgresql" $postgresql "token" $token) }}
{{- end }}
{{- end }}

{{/* One of them: (list $ SECRET KEY GIVEN NAME_OF_THE_VALUE WHY_NOT). */}}
{{- define "coterie.kept" -}}
{{- $root := index . 0 -}}
{{- $secret := lookup "v1" "Secret" $root.Release.Namespace (index . 1) | default dict -}}
{{- $kept := get ($secret.data | default dict) (index . 2) | b64dec -}}
{{- $given := index . 3 -}}
{{- if and $kept $given (ne $kept $given) -}}
{{- fail (printf "%s is not what the Secret %s/%s has kept: %s. Leave the value out, or delete the Secret if you mean it." (index . 4) $root.Release.Namespace (index . 1) (index . 5)) -}}
{{- end -}}
{{- $given | default $kept | default (randAlphaNum 40) -}}
{{- end }}

{{/* Variables of the stores, as YAML of a map. */}}
{{- define "coterie.stores" -}}
{{- include "coterie.generate" . -}}
{{- with include "coterie.redis" . }}
{{- $password := ternary $.Values.generated.redis $.Values.redis.password $.Values.redis.enabled }}
COTERIE_REDIS: {{ ternary (printf "%s,password=%s" . $password) . (ne $password "") | quote }}
{{- end }}
{{- with include "coterie.database" . }}
COTERIE_FEEDBACK_DATABASE: {{ . | quote }}
{{- $password := ternary $.Values.feedback.password $.Values.generated.postgresql (ne $.Values.feedback.database "") }}
{{- if $password }}
PGPASSWORD: {{ $password | quote }}
{{- end }}
{{- end }}
{{- end }}

{{/* Variables of the object store, as YAML of a map. */}}
{{- define "coterie.objectStore" -}}
AWS_REGION: {{ .Values.s3.region | quote }}
AWS_DEFAULT_REGION: {{ .Values.s3.region | quote }}
{{- with .Values.s3.endpoint }}
AWS_ENDPOINT_URL: {{ . | quote }}
{{- end }}
{{- with .Values.s3.accessKey }}
AWS_ACCESS_KEY_ID: {{ . | quote }}
AWS_SECRET_ACCESS_KEY: {{ $.Values.s3.secretKey | quote }}
{{- end }}
{{- end }}

{{/* What steps of the pipelines are told: of the chart's own Secrets, and of existing ones what the cluster shows. */}}
{{- define "coterie.pipelineVariables" -}}
{{- include "coterie.generate" . -}}
{{- $told := dict -}}
{{- if not .Values.pseudonym.existingSecret }}{{ $_ := set $told "COTERIE_PSEUDONYM_KEY" .Values.generated.key }}{{ end -}}
{{- if not .Values.stores.existingSecret }}{{ $told = merge $told (include "coterie.stores" . | fromYaml) }}{{ end -}}
{{- if not .Values.s3.existingSecret }}{{ $told = merge $told (include "coterie.objectStore" . | fromYaml) }}{{ end -}}
{{- $existing := list .Values.pseudonym.existingSecret .Values.stores.existingSecret .Values.s3.existingSecret -}}
{{- if .Values.token.enabled -}}
{{- if .Values.token.existingSecret -}}
{{- $existing = append $existing .Values.token.existingSecret -}}
{{- else -}}
{{- $_ := set $told "COTERIE_TOKEN" .Values.generated.token -}}
{{- end -}}
{{- end -}}
{{- range compact $existing -}}
{{- range $name, $value := (lookup "v1" "Secret" $.Release.Namespace .).data | default dict -}}
{{- if regexMatch "^(COTERIE|AWS|PG)" $name }}{{ $_ := set $told $name (b64dec $value) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- toYaml $told -}}
{{- end }}

{{/* A map, given as YAML, as the data of a Secret. */}}
{{- define "coterie.encoded" -}}
{{- range $name, $value := . | fromYaml }}
{{ $name }}: {{ toString $value | b64enc | quote }}
{{- end }}
{{- end }}
