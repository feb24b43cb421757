{{/* A pod that talks to Kubeflow Pipelines, up to its arguments. */}}
{{- define "coterie.pipelinePod" -}}
{{- $root := index . 0 -}}
{{ include "coterie.jobPod" (list $root "pipelines" (printf "%s-pipelines" $root.Release.Name) false) }}
volumes:
  - {name: tmp, emptyDir: {}}
  - {name: placement, configMap: {name: {{ $root.Release.Name }}-placement}}
  {{- if $root.Values.pipelines.multiUser }}
  - name: token
    projected: {sources: [{serviceAccountToken: {path: token, audience: pipelines.kubeflow.org, expirationSeconds: 7200}}]}
  {{- end }}
containers:
  - name: {{ index . 1 }}
    image: {{ $root.Values.images.train }}
    imagePullPolicy: IfNotPresent
    command: [python3, -m, pipelines.upload]
    env:
      - {name: HOME, value: /tmp}
      {{- if $root.Values.pipelines.multiUser }}
      - {name: KF_PIPELINES_SA_TOKEN_PATH, value: /var/run/secrets/kubeflow/pipelines/token}
      {{- end }}
    resources: {{ toYaml $root.Values.jobs.resources | nindent 6 }}
    securityContext: {{ include "coterie.containerSecurity" $root | nindent 6 }}
    volumeMounts:
      - {name: tmp, mountPath: /tmp}
      - {name: placement, mountPath: /etc/coterie-placement, readOnly: true}
      {{- if $root.Values.pipelines.multiUser }}
      - {name: token, mountPath: /var/run/secrets/kubeflow/pipelines, readOnly: true}
      {{- end }}
    args:
      - --host={{ $root.Values.pipelines.host }}
{{- end }}

{{/* Defaults of the run form: this release's own, under what the values say. */}}
{{- define "coterie.formDefaults" -}}
{{- $own := dict "deploy_namespace" .Release.Namespace "deploy_release" .Release.Name "deploy_timeout" .Values.deploy.timeout "publish_project" (regexReplaceAll "[^a-z0-9_]" .Release.Name "_") "publish_online_store" (ternary "redis" "sqlite" (or (ne (include "coterie.redis" .) "") (ne .Values.stores.existingSecret ""))) -}}
{{- if hasPrefix "postgresql" (include "coterie.database" .) }}{{ $_ := set $own "database" (include "coterie.database" .) }}{{ end -}}
{{- toYaml (merge (deepCopy .Values.pipelines.defaults) $own) -}}
{{- end }}

{{/* Parameters as arguments of pipelines.upload; the argument is a map as YAML. */}}
{{- define "coterie.formArguments" -}}
{{- range $name, $value := . | fromYaml }}
- --default
- {{ printf "%s=%s" $name (ternary (toString $value) (toJson $value) (kindIs "string" $value)) | quote }}
{{- end }}
{{- end }}
